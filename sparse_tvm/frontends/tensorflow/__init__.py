"""TensorFlow: SavedModel, Keras and TensorFlow Lite."""
