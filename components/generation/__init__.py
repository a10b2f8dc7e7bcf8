"""From weights to pictures: prompts, sampling, and what is written into a picture."""
