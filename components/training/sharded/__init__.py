"""Training state that is divided over processes: averaged, copied, saved, cut anew."""
