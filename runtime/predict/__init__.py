"""`vitrm-predict`: which class is on a picture, and how sure the model is."""

from vitrm.runtime.predict.predictions import Prediction, predict, prepare

__all__ = ["Prediction", "predict", "prepare"]
