"""Methods that decide which parameters of the tables stay."""
