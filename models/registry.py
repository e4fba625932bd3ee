"""The built-in recipes by name. A new model is one file and one line here."""

from __future__ import annotations

#: name -> (module of this package, class)
RECIPES = {
    "cnn": ("cnn", "CnnRecipe"),
    "gan": ("gan", "GanRecipe"),
    "mlp": ("mlp", "MlpRecipe"),
    "rnn": ("rnn", "RnnRecipe"),
    "transformer": ("transformer", "TransformerRecipe"),
}
