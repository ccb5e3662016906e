"""Light Forcing: autoregressive Wan video with sparse attention."""
