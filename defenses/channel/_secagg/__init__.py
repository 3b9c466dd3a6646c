"""Secure aggregation by double masking: bytes in, bytes out; knows neither Flower nor tensors."""
