"""Which smallest set of modules has to stay in FP32."""
