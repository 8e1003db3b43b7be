"""What tests share: tiny models, rows, logs, runs, and stand-ins for what is not there."""
