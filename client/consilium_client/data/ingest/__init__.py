"""The one way in for pixels: every source becomes a checked volume in the site's cache."""
