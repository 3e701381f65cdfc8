"""HAMMER: detecting and grounding multi-modal media manipulation (arXiv 2304.02556)."""
