"""Parameter-efficient fine-tuning: each method in a module of its own, put on any model by name."""
