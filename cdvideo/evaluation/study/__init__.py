"""The study: ways to learn a concept, compared on equal terms."""
