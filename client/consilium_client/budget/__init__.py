"""What this site permits and what its patients may spend: policy, price, charges, and the table."""
