"""titan-video: a minimal native-PyTorch trainer for video diffusion transformers."""
