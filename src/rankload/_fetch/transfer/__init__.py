"""Moving bytes: streams over the missing ranges of one file, their pace, their retries, the hash behind them."""
