"""Randomness, discrete Gaussian noise, the shares of distributed noise, and noise for metrics:
numpy, no torch.
"""
