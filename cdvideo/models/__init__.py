"""Bases of other families than Stable Diffusion's UNets: what a model is, family by family."""
