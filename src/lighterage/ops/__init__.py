"""What the modules do, as functions."""
