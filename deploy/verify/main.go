// Command verify reads what others run in deploy/ and beside the code as their
// programs do: it tells misspelt fields from those that there are.
//
//	verify kubernetes DIR    a kustomization, which it prints as built
//	verify compose FILE...   compose files, merged
//	verify dockerfile FILE
//
// It is a module of its own: what it brings does not belong among what a server
// on the open internet is built from.
package main

import (
	"errors"
	"fmt"
	"os"
)

func main() {
	if err := verify(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func verify(args []string) error {
	if len(args) < 2 {
		return errors.New("verify what?")
	}
	switch what, files := args[0], args[1:]; what {
	case "kubernetes":
		return verifyKubernetes(files[0])
	case "compose":
		return verifyCompose(files)
	case "dockerfile":
		return verifyDockerfile(files[0])
	default:
		return fmt.Errorf("%s is nothing to verify", what)
	}
}
