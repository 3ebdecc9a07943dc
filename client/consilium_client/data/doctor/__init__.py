"""The doctor: what is wrong with the site's data, why it matters, and how to mend it."""
