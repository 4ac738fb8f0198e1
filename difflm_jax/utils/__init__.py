"""What every room may use: files written whole, compiled programs kept between runs, names of dtypes."""
