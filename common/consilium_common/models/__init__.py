"""Networks by name, their weights as plain arrays, and what privacy asks of them."""
