"""De-identification: what in a site's files still tells who the patient is, and a clean copy."""
