"""How the embedded model is made: scenes, autoencoder, teacher, distillation, judge."""
