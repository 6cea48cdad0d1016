"""Run the copies of a load: buckets, threads, devices."""
