"""What a model is made of and how data flows through it: references, code, regions, observed runs, functional norms."""
