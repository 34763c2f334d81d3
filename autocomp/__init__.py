"""Compress trained models under a measured latency budget."""
