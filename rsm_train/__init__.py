"""Online learning of diffusion policies with Reweighted Score Matching."""
