"""Transfer learning on `tf.keras`: build, load, fine-tune, evaluate."""

__version__ = "0.1.0"
