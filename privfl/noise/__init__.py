"""Randomness, discrete Gaussian noise, the shares of distributed noise, and noise of metrics:
numpy, no torch.
"""
