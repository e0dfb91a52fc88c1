package main

import (
	"context"
	"io"
)

func runGrowth(ctx context.Context, args []string, stdout, stderr io.Writer) error { return nil }
