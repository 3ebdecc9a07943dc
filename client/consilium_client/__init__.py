"""A hospital site: its data, policy, training and the link that is its only way out."""
