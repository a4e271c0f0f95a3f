"""Markup of docstrings and READMEs becomes English, and what is not English is left out."""

import pytest

from lightning_danube.text.embedded.prose import clean, plain, prose

NUMPYDOC = """
Smooth a signal with a window.

The window is moved over the signal, and the values inside it
are averaged (see :func:`~scipy.signal.convolve`).

Parameters
----------
signal : array_like
    The signal to be smoothed.
window : {'flat', 'hann'}, optional
    The shape of the window.  The default is ``'hann'``.

    A flat window gives a moving average.
**options
    They are handed on to the window.

Returns
-------
smooth : ndarray
    An array of the same length as the signal.

See Also
--------
convolve : What it is made of.

Notes
-----
.. versionadded:: 1.2

The mean :math:`\\mu` of the signal does not change.  Its variance falls.

.. math:: \\sigma^2 = 1

References
----------
.. [1] A. Author, "A book about signals", 1999.

Examples
--------
>>> smooth([1, 2, 3])
[1, 2, 3]

This sentence belongs to an example.
"""

GOOGLE = """Moves a model to a device, which may take a while.

Args:
    model (`torch.nn.Module`, *optional*, defaults to `None`): The model that is moved. Its
        weights follow it to: the device.
    device (str): where the model goes
        - `"cpu"`: The model stays in main memory.

Returns:
    `bool`: Whether the model was moved at all.

Raises:
    ValueError: there is no such device.

Example::

    move(model, "cpu")

<Tip warning={true}>

A model that was moved keeps its gradients.

</Tip>

It is called as follows:

```python
move(model)  # This comment is no sentence of the text.
```
"""


def test_numpydoc_becomes_prose() -> None:
    assert prose(clean(NUMPYDOC)).split("\n\n") == [
        "Smooth a signal with a window.",
        "The window is moved over the signal, and the values inside it are averaged (see scipy.signal.convolve).",
        "signal: The signal to be smoothed.",
        "window: The shape of the window. The default is 'hann'.",
        "A flat window gives a moving average.",
        "**options: They are handed on to the window.",
        "An array of the same length as the signal.",
        "Its variance falls.",
    ]


def test_googles_style_becomes_prose() -> None:
    assert prose(clean(GOOGLE)).split("\n\n") == [
        "Moves a model to a device, which may take a while.",
        "model: The model that is moved. Its weights follow it to: the device.",
        "device: Where the model goes.",
        '"cpu": The model stays in main memory.',
        "Whether the model was moved at all.",
        "A model that was moved keeps its gradients.",
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (":param str a: the name of it\n:type a: str\n:raises KeyError: no such name", "a: The name of it."),
        (".. note:: A note is kept.\n\n.. code-block::\n\n    run it and see.", "A note is kept."),
        ("The loop is written like this::\n\n    for each of them.\n\nIt ends by itself.", "It ends by itself."),
        ("=====  =====\nA row  of it\n=====  =====\n\nThe table is gone.", "The table is gone."),
        ("The table is gone.\n\n| a | b |\n|---|---|\n| it is | a row |", "The table is gone."),
        ("- It has one item.\n- It has two items", "It has one item.\n\nIt has two items."),
        ("path -- where the file is", "path: Where the file is."),
        ("## Install\n\nRun the installer once.\n\n## Use\n\nThen use it every day.", "Then use it every day."),
        ("x = f(a, b) + g(c)\n\nreturn x[0] if y else None", ""),
        ("See https://example.org for more. The rest is here.", "The rest is here."),
        ("[![a](https://b)](https://c) <b>It</b> is [fast](https://a.b/c) and *small*.", "It is fast and small."),
        ("The values of <name> are kept. They stay the same.", "They stay the same."),
        ("Этот текст написан на другом языке. This text is English.", "This text is English."),
    ],
)  # fmt: skip
def test_markup_is_removed(text: str, expected: str) -> None:
    assert prose(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("see :class:`~a.b.C` and :meth:`run <a.run>`", "see a.b.C and run"),
        ("a `link <https://a.b>`_ and a `name`_ [1]_", "a link and a name"),
        ("the [`~Trainer.step`] of ``x[0, 1][k]``", "the Trainer.step of x[0, 1][k]"),
        ("**two** *one* 2 * 3 * 4 **kwargs", "two one 2 * 3 * 4 **kwargs"),
        ("the __init__ of *source_address* .", "the __init__ of source_address."),
    ],
)
def test_inline_markup_becomes_its_text(text: str, expected: str) -> None:
    assert plain(text) == expected
