// Receive receives a file from another machine, where send runs.
//
//	go run ./examples/go/receive [-server URL] [-dir FOLDER] INVITATION
package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"

	"parley/examples/go/pairing"
)

func main() {
	server := flag.String("server", "http://localhost:1234", "`URL` of the parley server")
	dir := flag.String("dir", ".", "`FOLDER` for the file")
	flag.Parse()
	if flag.NArg() != 1 {
		fmt.Fprintln(os.Stderr, "usage: receive [-server URL] [-dir FOLDER] INVITATION")
		os.Exit(2)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if err := receive(ctx, *server, *dir, flag.Arg(0)); err != nil {
		fmt.Fprintln(os.Stderr, "receive:", err)
		os.Exit(1)
	}
}

func receive(ctx context.Context, server, dir, invitation string) error {
	folder, err := os.OpenRoot(dir) // no name leads out of it
	if err != nil {
		return err
	}
	defer folder.Close()
	session, err := pairing.Redeem(ctx, server, invitation)
	if err != nil {
		return err
	}
	peer, err := session.Connect(ctx)
	if err != nil {
		return err
	}
	defer peer.Close()
	return receiveFile(peer, folder)
}

func receiveFile(peer *pairing.Peer, folder *os.Root) error {
	message, err := peer.Receive()
	if err != nil {
		return err
	}
	var header struct {
		Name string
		Size int64
	}
	if err := json.Unmarshal(message, &header); err != nil {
		return err
	}
	file, err := folder.OpenFile(header.Name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o644) // overwrites nothing
	if err != nil {
		return err
	}
	if err := errors.Join(receiveContent(peer, file, header.Size), file.Close()); err != nil {
		return errors.Join(err, folder.Remove(header.Name))
	}
	if _, err := peer.Write([]byte("received")); err != nil {
		return err
	}
	fmt.Printf("received %q, %d bytes\n", header.Name, header.Size)
	peer.Receive() // the other side closes the connection, once it has the receipt
	return nil
}

// receiveContent writes the content to file, and compares its hash.
func receiveContent(peer *pairing.Peer, file io.Writer, size int64) error {
	hash := sha256.New()
	for size > 0 {
		part, err := peer.Receive()
		if err != nil {
			return err
		}
		if _, err := io.MultiWriter(file, hash).Write(part); err != nil {
			return err
		}
		size -= int64(len(part))
	}
	want, err := peer.Receive()
	if err != nil {
		return err
	}
	if size < 0 || !bytes.Equal(want, hash.Sum(nil)) {
		return errors.New("the file was damaged on its way")
	}
	return nil
}
