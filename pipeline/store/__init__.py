"""The feature store: its arrays, the receipts of its units, its index, and what checks them."""
