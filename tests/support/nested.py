"""Nested states, such as those of an optimizer."""


def flat(state):
    """Return every tensor and number of a nested state under its path."""
    if isinstance(state, dict):
        state = state.items()
    elif isinstance(state, (list, tuple)):
        state = enumerate(state)
    else:
        return {(): state}
    return {(key, *path): value for key, inner in state for path, value in flat(inner).items()}
