"""Operations on arrays: products, attention, cross-entropy, random numbers, and their gradients. Knows no models."""
