"""Images from a hospital's archive (PACS): found, fetched, checked and resumed."""
