"""Finds stop strings in text that arrives in pieces, holding back only what may still become one.

An Aho-Corasick automaton over all stop strings of a request (Aho & Corasick 1975): one dictionary
step per character however many and however long they are, and the depth of its state is exactly the
text that must be held back. It knows nothing of tokens.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from functools import lru_cache


class _Node:
    __slots__ = ("children", "depth", "fallback", "match")

    def __init__(self, depth: int) -> None:
        self.children: dict[str, _Node] = {}
        self.depth = depth
        self.fallback = self  # the longest proper suffix of this node's text that is in the tree
        self.match: str | None = None  # the longest stop string that ends here


class StopStrings:
    """The first stop string to be complete wins, however the text is cut; of several that end
    together, the longest.

    Raises: ValueError for an empty stop string.
    """

    def __init__(self, stops: Sequence[str], *, include: bool = False) -> None:
        if not all(stops):
            raise ValueError("a stop string must not be empty")
        self.matched: str | None = None
        self._include = include
        self._held = ""
        self._root = self._state = _build(tuple(stops))

    def push(self, text: str) -> str:
        """The text that may be shown now. Once `matched` is set it was the last: nothing may be
        pushed after it.
        """
        assert self.matched is None, "text pushed after a stop string"
        root, node = self._root, self._state
        for end, char in enumerate(text, 1):
            while char not in node.children and node is not root:
                node = node.fallback
            node = node.children.get(char, root)
            if node.match is not None:
                self.matched = node.match
                text = self._held + text[:end]
                self._held = ""
                return text if self._include else text[: -len(node.match)]
        self._state = node
        text = self._held + text
        shown = len(text) - node.depth
        self._held = text[shown:]
        return text[:shown]

    def finish(self) -> str:
        """The text held back, when the sequence ended without a match."""
        text, self._held = self._held, ""
        return text


@lru_cache(maxsize=32)  # clients send the same stop strings again and again
def _build(stops: tuple[str, ...]) -> _Node:
    root = _Node(0)
    for stop in stops:
        node = root
        for char in stop:
            if char not in node.children:
                node.children[char] = _Node(node.depth + 1)
            node = node.children[char]
        node.match = stop
    root.fallback = root
    queue = deque(root.children.values())
    for node in queue:
        node.fallback = root
    while queue:
        parent = queue.popleft()
        for char, node in parent.children.items():
            candidate = parent.fallback
            while char not in candidate.children and candidate is not root:
                candidate = candidate.fallback
            node.fallback = candidate.children.get(char, root)
            node.match = node.match or node.fallback.match
            queue.append(node)
    return root
