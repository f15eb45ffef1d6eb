"""Benchmarks: what they ask for is drawn or answered in their own formats, and their scores are collected."""
