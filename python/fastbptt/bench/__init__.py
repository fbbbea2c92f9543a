"""Measuring training steps: what `fastbptt bench` and the repository's benchmarks share.

Nothing here is imported by `import fastbptt`, and another library only when a step of it is made.
"""
