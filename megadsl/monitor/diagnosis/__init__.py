"""What a finished model does with a signal, whoever trained it: moments, attention, unused layers, outliers, the plan that fits."""
