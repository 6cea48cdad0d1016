"""What torch is told and asked, in one place."""
