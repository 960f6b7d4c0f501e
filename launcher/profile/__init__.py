"""`phalanx profile`: where the time of a configuration's steps goes, operator by operator, on every rank."""
