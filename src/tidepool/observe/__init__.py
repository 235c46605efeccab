"""What watches a running server: it reads what `tidepool.metrics` names."""
