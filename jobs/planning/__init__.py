"""Before a run: does it fit, and where does what go?"""
