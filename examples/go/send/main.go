// Send sends a file to another machine, where receive runs.
//
//	go run ./examples/go/send [-server URL] FILE
package main

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"

	"parley/examples/go/pairing"
)

func main() {
	server := flag.String("server", "http://localhost:1234", "`URL` of the parley server")
	flag.Parse()
	if flag.NArg() != 1 {
		fmt.Fprintln(os.Stderr, "usage: send [-server URL] FILE")
		os.Exit(2)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if err := send(ctx, *server, flag.Arg(0)); err != nil {
		fmt.Fprintln(os.Stderr, "send:", err)
		os.Exit(1)
	}
}

func send(ctx context.Context, server, name string) error {
	file, err := os.Open(name)
	if err != nil {
		return err
	}
	defer file.Close()
	session, err := pairing.Mint(ctx, server)
	if err != nil {
		return err
	}
	fmt.Println("on the other machine: go run ./examples/go/receive -server", server, session.Invitation())
	peer, err := session.Connect(ctx)
	if err != nil {
		return err
	}
	defer peer.Close()
	return sendFile(peer, file)
}

// sendFile sends name and size, the content in parts, and its hash.
func sendFile(peer *pairing.Peer, file *os.File) error {
	info, err := file.Stat()
	if err != nil {
		return err
	}
	header, err := json.Marshal(map[string]any{"name": info.Name(), "size": info.Size()})
	if err != nil {
		return err
	}
	if _, err := peer.Write(header); err != nil {
		return err
	}
	hash := sha256.New()
	if _, err := io.CopyN(io.MultiWriter(peer, hash), file, info.Size()); err != nil { // 32 KiB at a time
		return err
	}
	if _, err := peer.Write(hash.Sum(nil)); err != nil {
		return err
	}
	if _, err := peer.Receive(); err != nil { // the receipt
		return err
	}
	fmt.Printf("sent %s, %d bytes, %s\n", info.Name(), info.Size(), peer.Route())
	return nil
}
