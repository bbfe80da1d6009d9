"""What predictors of live neurons are trained on and how they are used."""
