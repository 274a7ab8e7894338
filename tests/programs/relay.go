// Connections copied by io.Copy, which uses splice(2) between TCP connections where it sees that they are such.
//
// relay echo HOW ADDRESS | relay pass HOW ADDRESS UPSTREAM | relay ask HOW ADDRESS CONNECTIONS BYTES
//
// HOW is "splice", or "copy" to read and write alone.
package main

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"io"
	"math/rand"
	"net"
	"os"
	"strconv"
	"sync"
	"time"
)

const patience = 30 * time.Second

var splices bool

func main() {
	splices = os.Args[2] == "splice"
	arguments := os.Args[3:]
	switch os.Args[1] {
	case "echo":
		serve(arguments[0], func(one *net.TCPConn) error {
			defer one.CloseWrite()
			return carry(one, one)
		})
	case "pass":
		serve(arguments[0], func(one *net.TCPConn) error { return pass(one, arguments[1]) })
	case "ask":
		connections, _ := strconv.Atoi(arguments[1])
		length, _ := strconv.Atoi(arguments[2])
		ask(arguments[0], connections, length)
	}
}

func serve(address string, work func(*net.TCPConn) error) {
	listener, err := net.Listen("tcp4", address)
	if err != nil {
		fail(err)
	}
	for {
		connection, err := listener.Accept()
		if err != nil {
			fail(err)
		}
		go func() {
			defer connection.Close()
			if err := work(connection.(*net.TCPConn)); err != nil {
				fmt.Fprintln(os.Stderr, err)
			}
		}()
	}
}

// Both directions at once, each ended when it has ended at the other side.
func pass(near *net.TCPConn, upstream string) error {
	connection, err := net.Dial("tcp4", upstream)
	if err != nil {
		return err
	}
	defer connection.Close()
	far := connection.(*net.TCPConn)
	back := make(chan error)
	go func() {
		err := carry(near, far)
		near.CloseWrite()
		back <- err
	}()
	err = carry(far, near)
	far.CloseWrite()
	if other := <-back; err == nil {
		err = other
	}
	return err
}

func carry(to, from *net.TCPConn) error {
	if splices {
		_, err := io.Copy(to, from)
		return err
	}
	// What only reads and only writes has nothing that io.Copy could splice with.
	_, err := io.Copy(struct{ io.Writer }{to}, struct{ io.Reader }{from})
	return err
}

// Sends bytes on every connection, all at the same time, and says what comes back.
func ask(address string, connections, length int) {
	said := make([]string, connections)
	var all sync.WaitGroup
	for at := range said {
		all.Add(1)
		go func(at int) {
			defer all.Done()
			said[at] = exchange(address, int64(at), length)
		}(at)
	}
	all.Wait()
	for at, line := range said {
		fmt.Println(at, line)
	}
}

func exchange(address string, seed int64, length int) string {
	connection, err := net.Dial("tcp4", address)
	if err != nil {
		return err.Error()
	}
	defer connection.Close()
	connection.SetDeadline(time.Now().Add(patience))
	data := make([]byte, length)
	rand.New(rand.NewSource(seed)).Read(data)
	go func() {
		io.Copy(connection, bytes.NewReader(data))
		connection.(*net.TCPConn).CloseWrite()
	}()
	sum := sha256.New()
	count, err := io.Copy(sum, connection)
	same := bytes.Equal(sum.Sum(nil), sha(data))
	return fmt.Sprintf("%d bytes, the same: %v, error: %v", count, same, err)
}

func sha(data []byte) []byte {
	sum := sha256.Sum256(data)
	return sum[:]
}

func fail(err error) {
	fmt.Fprintln(os.Stderr, err)
	os.Exit(1)
}
