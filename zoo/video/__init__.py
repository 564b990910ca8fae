"""Video diffusion transformers: model, pipeline, rectified flow."""
