"""Delivery strategies: how checkpoint bytes reach this rank."""
