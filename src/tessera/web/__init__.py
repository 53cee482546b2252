"""The page: what a run does, live in a browser, each number beside what proves it."""
