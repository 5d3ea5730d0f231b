"""DP-SGD through Opacus: randomness, sampling, optimizer and the local training of one site.

The only package that needs torch.
"""
