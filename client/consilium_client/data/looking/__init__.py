"""Looking at the site's own data: pictures of cases and statistics; all of it stays at the site."""
